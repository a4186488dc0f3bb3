# Finds torch's stable-ABI headers and libtorch_cpu.
#
# Out: GFL_TORCH_INCLUDE, GFL_TORCH_VERSION, target gfl_torch_cpu. In: GFL_TORCH_ROOT (a plain libtorch, or
# the torch folder of a Python installation) or Python_EXECUTABLE. Not find_package(Torch): that wants
# the CUDA toolkit whenever torch was built with CUDA, and this library uses neither.
set(torch_root "${GFL_TORCH_ROOT}")
if(NOT torch_root)
  # find_spec locates a top-level package without importing it.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT torch_root)
    gfl_fail("torch is not installed in the build environment"
             "install torch")
  endif()
endif()

find_path(GFL_TORCH_INCLUDE torch/csrc/stable/library.h
  PATHS "${torch_root}/include" NO_DEFAULT_PATH NO_CACHE)
find_library(GFL_TORCH_LIBRARY torch_cpu PATHS "${torch_root}/lib" NO_DEFAULT_PATH NO_CACHE)
if(NOT GFL_TORCH_INCLUDE OR NOT GFL_TORCH_LIBRARY)
  gfl_fail("${torch_root} holds no torch of version 2.10 or newer with its headers and libtorch_cpu"
           "install torch 2.10 or newer")
endif()

# version.py and build-version carry the local part (+cu130), the header does not.
set(GFL_TORCH_VERSION "")
if(EXISTS "${torch_root}/version.py")
  file(STRINGS "${torch_root}/version.py" GFL_TORCH_VERSION REGEX "^__version__ *=")
  string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" GFL_TORCH_VERSION "${GFL_TORCH_VERSION}")
elseif(EXISTS "${torch_root}/build-version")
  file(STRINGS "${torch_root}/build-version" GFL_TORCH_VERSION LIMIT_COUNT 1)
endif()
if(NOT GFL_TORCH_VERSION MATCHES "^[0-9]+\\.[0-9]+")
  gfl_fail("the version of torch in ${torch_root} could not be read"
           "reinstall torch")
endif()
if(GFL_TORCH_VERSION VERSION_LESS 2.10)
  gfl_fail("torch ${GFL_TORCH_VERSION} is older than 2.10"
           "install torch 2.10 or newer")
endif()
message(STATUS "torch ${GFL_TORCH_VERSION} in ${torch_root}")

add_library(gfl_torch_cpu SHARED IMPORTED)
set_target_properties(gfl_torch_cpu PROPERTIES IMPORTED_LOCATION "${GFL_TORCH_LIBRARY}")
