#include "bind/bind.hpp"

using namespace lilliput;

NB_MODULE(_native, m) {
  m.doc() = "Kernels and the decode loop. Import lilliput.engine.native, not this.";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  nanobind::exception<NotANumber>(m, "NotANumber", PyExc_ValueError);
  bind::bind_ops(m);
  bind::bind_integer_ops(m);
  bind::bind_model(m);
  bind::bind_integer_model(m);
}
