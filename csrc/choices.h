// Kernels that serve only those who ask for them, as long as no GPU has timed them.
#pragma once

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace groupdetr {

inline bool is_asked_for(const char* variable) {
  const char* const value = std::getenv(variable);
  return value != nullptr && std::string_view(value) == "1";
}

// Whether the backward pass of deformable attention goes by tiles (cuda/ms_deform_attn_tiles.cuh) where it can. The
// environment decides when the extension is loaded; the module's choose_deformable_tiles() for comparisons.
inline std::atomic<bool> deformable_tiles = is_asked_for("GROUPDETR_FAST_DEFORMABLE_TILES");

}  // namespace groupdetr
