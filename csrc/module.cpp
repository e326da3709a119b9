// The Python module `groupdetr_fast._C`. Importing it runs the static initialisers of the other files, which register
// their kernels with torch's dispatcher. Besides, it tells which GPUs the CUDA kernels were compiled for, and chooses
// between kernels for benchmarks and tests.

#include <Python.h>
#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "architectures.h"
#include "choices.h"
#include "linear_assignment_way.h"

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

PyObject* choose_deformable_tiles(PyObject*, PyObject* arguments) {
  int chosen = 0;
  if (!PyArg_ParseTuple(arguments, "p", &chosen)) return nullptr;
  return PyBool_FromLong(groupdetr::deformable_tiles.exchange(chosen != 0));
}
#ifdef USE_CUDA
PyObject* choose_assignment_way(PyObject*, PyObject* arguments) {
  int shared_costs = 0, fixed_point = 0;
  if (!PyArg_ParseTuple(arguments, "ii", &shared_costs, &fixed_point)) return nullptr;
  groupdetr::choose_assignment_way(shared_costs, fixed_point);
  Py_RETURN_NONE;
}
#endif

PyMethodDef methods[] = {
    {"has_code", has_code, METH_VARARGS,
     "has_code(architectures: str, capability: int, oldest: int = 0) -> bool: whether code for one of them that is not "
     "older runs on such a GPU (75: 7.5)"},
    {"cuda_driver_version", cuda_driver_version, METH_NOARGS,
     "The newest CUDA that the driver supports, 13000 for 13.0; 0 without a driver, or if built without CUDA"},
    {"choose_deformable_tiles", choose_deformable_tiles, METH_VARARGS,
     "choose_deformable_tiles(chosen: bool) -> bool: whether deformable attention's backward pass goes by tiles on "
     "GPUs "
     "from now on; what was chosen before"},
#ifdef USE_CUDA
    {"choose_assignment_way", choose_assignment_way, METH_VARARGS,
     "choose_assignment_way(shared_costs: int, fixed_point: int): 0, 1, or -1 to leave it to the environment and the "
     "GPU"},
#endif
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
