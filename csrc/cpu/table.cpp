// The choice of instruction set: the best the machine has, or the one GFL_CPU_ISA names. Made once.
#include <cstdlib>
#include <string>

#include "../error.h"
#include "kernels.h"

namespace gfl {
namespace {

struct Isa {
  KernelTable table;
  bool runs;
};
#define GFL_TABLE(isa) \
  {#isa, &quality_##isa, &distribution_##isa, &head_##isa, &decode_##isa, &distillation_##isa}

#if defined(GFL_HAVE_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
#endif
#if defined(GFL_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Worst first.
const Isa kIsas[] = {
    {GFL_TABLE(baseline), true},
#if defined(GFL_HAVE_AVX2)
    {GFL_TABLE(avx2), has_avx2()},
#endif
#if defined(GFL_HAVE_AVX512)
    {GFL_TABLE(avx512), has_avx512()},
#endif
};

const std::string& available() {
  static const std::string names = [] {
    std::string list;
    for (const Isa& isa : kIsas) {
      if (!isa.runs) continue;
      if (!list.empty()) list += ',';
      list += isa.table.name;
    }
    return list;
  }();
  return names;
}

const KernelTable* pick() {
  const char* const wanted = std::getenv("GFL_CPU_ISA");
  const KernelTable* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.runs && (!wanted || !*wanted || std::string(wanted) == isa.table.name))
      best = &isa.table;
  }
  return best;
}

}  // namespace

const KernelTable* kernels() {
  static const KernelTable* const table = pick();
  if (!table) {
    set_error(std::string("GFL_CPU_ISA=") + std::getenv("GFL_CPU_ISA") +
              " cannot run here; available: " + available());
  }
  return table;
}

}  // namespace gfl

extern "C" const char* gfl_cpu_isa(void) {
  const gfl::KernelTable* const table = gfl::kernels();
  return table ? table->name : nullptr;
}

extern "C" const char* gfl_available_isas(void) { return gfl::available().c_str(); }
