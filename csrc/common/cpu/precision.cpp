#include "common/cpu/precision.h"

#include <Python.h>

namespace throughtime {

int float32_parts_asked() {
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* const torch = PyImport_ImportModule("torch");
  PyObject* const precision =
      torch ? PyObject_CallMethod(torch, "get_float32_matmul_precision", nullptr) : nullptr;
  int parts = 3;
  if (precision && PyUnicode_Check(precision)) {
    if (PyUnicode_CompareWithASCIIString(precision, "high") == 0) parts = 2;
    if (PyUnicode_CompareWithASCIIString(precision, "medium") == 0) parts = 1;
  }
  PyErr_Clear();  // torch raises where its older and its newer switch disagree: be exact then
  Py_XDECREF(precision);
  Py_XDECREF(torch);
  PyGILState_Release(state);
  return parts;
}

}  // namespace throughtime
