# Whether the CUDA kernels are built, and for which GPUs.
#
# In: GFL_CUDA, GFL_CUDA_ARCHITECTURES. Out: GFL_HAVE_CUDA, CMAKE_CUDA_ARCHITECTURES, GFL_CUDA_BUILT_FOR;
# or a member of the list GFL_LEFT_OUT.
set(GFL_HAVE_CUDA OFF)
set(GFL_CUDA_BUILT_FOR "")
set(why "${GFL_CUDA_WHY_NOT}")
if(GFL_CUDA STREQUAL "OFF" AND NOT why)
  set(why "it was not asked for")
elseif(GFL_SANITIZE)
  set(why "the build has sanitizers")
elseif(NOT WIN32 AND NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(why "there is no CUDA for ${CMAKE_SYSTEM_NAME}")
elseif(NOT GFL_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(why "no working nvcc was found")
  endif()
endif()
if(why)
  if(GFL_CUDA STREQUAL "ON")
    gfl_fail("the CUDA kernels cannot be built: ${why}"
             "install the CUDA toolkit and set CUDACXX to its nvcc")
  endif()
  list(APPEND GFL_LEFT_OUT "\"cuda\": \"${why}\"")
  message(STATUS "CUDA: left out, ${why}")
  return()
endif()

# Set before the language is enabled: CMake's own default is what this machine has.
set(CMAKE_CUDA_ARCHITECTURES ${GFL_CUDA_ARCHITECTURES})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  foreach(arch IN ITEMS 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${arch}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
      set(newest ${arch})
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)  # for what comes after it
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # which looks for the driver when it is first called
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(GFL_HAVE_CUDA ON)
string(REPLACE ";" "," GFL_CUDA_BUILT_FOR "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${GFL_CUDA_BUILT_FOR}")
