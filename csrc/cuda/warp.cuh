// The lanes of a warp. Free of torch.
#pragma once

#include <cstdint>

namespace groupdetr {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffff;  // the mask with which all lanes of a warp meet

}  // namespace groupdetr
