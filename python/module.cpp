// gfl_kernels._C: what the library says about itself. Tensors never pass through here; they go
// through the ops that libgfl_native registers with torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gfl_kernels/gfl_kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled library of gfl_kernels";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(gfl_build_info()); },
      "How the library was built: a dict");
  m.def(
      "cpu_isa",
      [] {
        const char* isa = gfl_cpu_isa();
        if (isa == nullptr) throw std::runtime_error(gfl_last_error());
        return std::string(isa);
      },
      "The instruction set in use; RuntimeError if GFL_CPU_ISA asks for one that cannot run here");
  m.def(
      "available_isas", [] { return py::str(gfl_available_isas()).attr("split")(","); },
      "The instruction sets that are compiled in and that this machine has");
}
