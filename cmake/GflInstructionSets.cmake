# Which instruction sets the kernels are compiled for.
#
# In: GFL_DISPATCH. Out: GFL_ISAS (baseline first), GFL_ISA_FLAGS_<isa>; members of the list GFL_LEFT_OUT. Each is
# chosen at run time, so the build machine need not have it; only the compiler must know its flags.
include(CheckCXXCompilerFlag)

set(GFL_ISAS baseline)
set(GFL_ISA_FLAGS_baseline "")
if(NOT GFL_DISPATCH)
  list(APPEND GFL_LEFT_OUT "\"avx2\": \"GFL_DISPATCH is off\"" "\"avx512\": \"GFL_DISPATCH is off\"")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(GFL_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(GFL_ISA_FLAGS_avx512 ${GFL_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
      -mprefer-vector-width=512)
  foreach(isa IN ITEMS avx2 avx512)
    string(REPLACE ";" " " flags "${GFL_ISA_FLAGS_${isa}}")
    check_cxx_compiler_flag("${flags}" GFL_COMPILER_KNOWS_${isa})
    if(GFL_COMPILER_KNOWS_${isa})
      list(APPEND GFL_ISAS ${isa})
    else()
      set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
      list(APPEND GFL_LEFT_OUT "\"${isa}\": \"${compiler} does not know ${flags}\"")
    endif()
  endforeach()
endif()
message(STATUS "instruction sets: ${GFL_ISAS}")
