// The architectures that the CUDA kernels of this extension were compiled for, and which GPUs they serve.
#pragma once

#include <charconv>
#include <string_view>

namespace groupdetr {

// In nvcc's words: sm_90 for machine code, compute_90 for PTX, from which a driver makes machine code. From setup.py.
#ifdef GROUPDETR_FAST_ARCHITECTURES
inline constexpr const char* kArchitectures = GROUPDETR_FAST_ARCHITECTURES;
#else
inline constexpr const char* kArchitectures = "";
#endif

// Whether code for one architecture, not older than `oldest`, runs on a GPU of a compute capability, 75 for 7.5.
// Machine code serves later minor versions of its major one, PTX every later version; with the suffix f, both serve
// their family alone, with a one GPU.
inline bool code_serves(std::string_view architecture, int capability, int oldest) {
  const bool ptx = architecture.starts_with("compute_");
  const std::string_view digits = architecture.substr(architecture.find('_') + 1);
  int version = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), version);
  if (error != std::errc() || version < oldest) return false;
  const std::string_view suffix(end, digits.data() + digits.size() - end);
  if (suffix == "a") return capability == version;
  const bool same_major = capability / 10 == version / 10;
  return capability >= version && (same_major || (ptx && suffix.empty()));
}

// Whether any code of a list with spaces in between does.
inline bool has_code(std::string_view architectures, int capability, int oldest = 0) {
  while (!architectures.empty()) {
    const size_t length = architectures.find(' ');
    if (code_serves(architectures.substr(0, length), capability, oldest)) return true;
    architectures.remove_prefix(length == std::string_view::npos ? architectures.size() : length + 1);
  }
  return false;
}

}  // namespace groupdetr
