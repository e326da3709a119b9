// The Python module `groupdetr_fast._C`. It has no functions of its own: importing it runs the static initialisers of
// the other files, which register their kernels with torch's dispatcher.

#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Kernels of groupdetr_fast, registered by importing this module.", -1, nullptr};
  return PyModule_Create(&definition);
}
