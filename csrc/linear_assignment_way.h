// Which way the GPU kernel of linear_assignment goes, for tests and benchmarks of each; cuda/linear_assignment.cu.
#pragma once

namespace groupdetr {

// Whether costs are copied to shared memory where they fit, and whether they are added up in fixed point where that is
// exact: 0 or 1, or -1 for what the environment says of the first, and the GPU of the second.
void choose_assignment_way(int shared_costs, int fixed_point);

}  // namespace groupdetr
