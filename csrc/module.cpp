// The Python module `groupdetr_fast._C`. Importing it runs the static initialisers of the other files, which register
// their kernels with torch's dispatcher. Besides, it tells which GPUs the CUDA kernels were compiled for, and chooses
// between kernels for benchmarks and tests.

#include <Python.h>

#include <atomic>
#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "architectures.h"
#include "choices.h"

namespace {

PyObject* has_code(PyObject*, PyObject* arguments) {
  const char* architectures = nullptr;
  int capability = 0, oldest = 0;
  if (!PyArg_ParseTuple(arguments, "si|i", &architectures, &capability, &oldest)) return nullptr;
  return PyBool_FromLong(groupdetr::has_code(architectures, capability, oldest));
}

PyObject* cuda_driver_version(PyObject*, PyObject*) {
  int version = 0;
#ifdef USE_CUDA
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
#endif
  return PyLong_FromLong(version);
}

// Sets one of choices.h, and returns what it was before.
template <std::atomic<int>& choice>
PyObject* choose(PyObject*, PyObject* arguments) {
  int chosen = 0;
  if (!PyArg_ParseTuple(arguments, "i", &chosen)) return nullptr;
  return PyLong_FromLong(choice.exchange(chosen));
}

PyMethodDef methods[] = {
    {"has_code", has_code, METH_VARARGS,
     "has_code(architectures: str, capability: int, oldest: int = 0) -> bool: whether code for one of them that is not "
     "older runs on such a GPU (75: 7.5)"},
    {"cuda_driver_version", cuda_driver_version, METH_NOARGS,
     "The newest CUDA that the driver supports, 13000 for 13.0; 0 without a driver, or if built without CUDA"},
    {"choose_deformable_tiles", choose<groupdetr::deformable_tiles>, METH_VARARGS,
     "choose_deformable_tiles(chosen: int) -> int: whether deformable attention's backward pass goes by tiles on GPUs "
     "from now on, 0 or 1; what was chosen before"},
    {"choose_deformable_shared_sort", choose<groupdetr::deformable_shared_sort>, METH_VARARGS,
     "choose_deformable_shared_sort(chosen: int) -> int: whether deformable attention's backward pass sorts in shared "
     "memory on GPUs from now on, 0 or 1; what was chosen before"},
    {"choose_deformable_products", choose<groupdetr::deformable_products>, METH_VARARGS,
     "choose_deformable_products(chosen: int) -> int: whether deformable attention's forward pass goes by products on "
     "tensor cores from now on, 0 or 1; what was chosen before"},
    {"choose_assignment_shared_costs", choose<groupdetr::assignment_shared_costs>, METH_VARARGS,
     "choose_assignment_shared_costs(chosen: int) -> int: whether linear_assignment copies costs to shared memory on "
     "GPUs from now on, 0 or 1; what was chosen before"},
    {"choose_assignment_fixed_point", choose<groupdetr::assignment_fixed_point>, METH_VARARGS,
     "choose_assignment_fixed_point(chosen: int) -> int: whether linear_assignment adds up in fixed point on GPUs from "
     "now on, 0, 1, or -1 for what suits the GPU; what was chosen before"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Kernels of groupdetr_fast, registered by importing this module.", -1, methods};
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef USE_CUDA
  constexpr long kCudaVersion = CUDART_VERSION;
#else
  constexpr long kCudaVersion = 0;
#endif
  // The architectures of the CUDA kernels, empty without any, and the version of CUDA that compiled them.
  if (PyModule_AddStringConstant(module, "architectures", groupdetr::kArchitectures) < 0 ||
      PyModule_AddIntConstant(module, "cuda_version", kCudaVersion) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
