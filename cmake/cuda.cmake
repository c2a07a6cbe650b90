# Decides whether the CUDA kernels are built, with which nvcc, and for which architectures.
#   CFRT_CUDA = AUTO  nvcc on PATH, in $CUDACXX or under /usr/local/cuda: build; else a CPU-only module, said clearly
#   CFRT_CUDA = ON    as AUTO, or NVIDIA's wheels in the build environment; else an error
#   CFRT_CUDA = OFF   never
# CFRT_CUDA_ARCHS in the environment, "89" or "80,89", builds for those alone: a release is for all of them.
# Only the static CUDA runtime is linked, so the module imports where there is no driver.

set(CFRT_CUDA_FOUND OFF)
set(CFRT_CUDA_VERSION "")
set(CFRT_CUDA_ARCHS "")

# The wheels (nvidia-cuda-nvcc, -crt, -runtime, -cccl, nvidia-nvvm) merge into one toolkit at site-packages/nvidia/cu13.
# Its libraries lie in lib/, while nvcc looks in lib64/.
function(cfrt_use_nvcc_of_wheels)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "from importlib.util import find_spec as f; s = f('nvidia'); print(*(s.submodule_search_locations if s else ()), sep=';')"
    OUTPUT_VARIABLE roots OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(TRANSFORM roots APPEND "/cu13/bin" OUTPUT_VARIABLE bins)
  find_program(CFRT_WHEEL_NVCC nvcc PATHS ${bins} NO_DEFAULT_PATH)
  if(CFRT_WHEEL_NVCC)
    cmake_path(GET CFRT_WHEEL_NVCC PARENT_PATH bin)
    set(ENV{CUDACXX} "${CFRT_WHEEL_NVCC}")
    set(ENV{CUDAFLAGS} "-L${bin}/../lib $ENV{CUDAFLAGS}")
  endif()
endfunction()

# The architectures we ship, or those asked for, less those this nvcc does not know; machine code for each, and PTX for
# what comes later.
function(cfrt_cuda_architectures)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(archs 80 86 89 90 100 120)
  if(DEFINED ENV{CFRT_CUDA_ARCHS})
    string(REPLACE "," ";" archs "$ENV{CFRT_CUDA_ARCHS}")
    list(SORT archs COMPARE NATURAL)
  endif()
  foreach(arch IN LISTS archs)
    if(NOT known MATCHES "compute_${arch}\n")
      message(STATUS "cfrt: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know sm_${arch}; left out")
      list(REMOVE_ITEM archs ${arch})
    endif()
  endforeach()
  if(NOT archs)
    message(FATAL_ERROR "expected CFRT_CUDA_ARCHS to name architectures of nvcc ${CMAKE_CUDA_COMPILER_VERSION}, as in "
                        "\"89\" or \"80,89\", got \"$ENV{CFRT_CUDA_ARCHS}\"")
  endif()
  list(TRANSFORM archs APPEND "-real" OUTPUT_VARIABLE cmake_archs)
  list(GET archs -1 newest)
  set(CMAKE_CUDA_ARCHITECTURES "${cmake_archs};${newest}-virtual" PARENT_SCOPE)
  list(JOIN archs "," joined)
  set(CFRT_CUDA_ARCHS "${joined}" PARENT_SCOPE)
endfunction()

if(NOT CFRT_CUDA STREQUAL "OFF")
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(CFRT_NVCC nvcc PATHS /usr/local/cuda/bin)
    set(works OFF)
    if(CFRT_NVCC)  # what is left of a removed toolkit may still be on PATH
      execute_process(COMMAND "${CFRT_NVCC}" --version RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
      if(failed)
        message(STATUS "cfrt: ${CFRT_NVCC} does not run, and is ignored")
      else()
        set(works ON)
      endif()
    endif()
    if(works)
      set(ENV{CUDACXX} "${CFRT_NVCC}")
    elseif(CFRT_CUDA STREQUAL "ON")
      cfrt_use_nvcc_of_wheels()
    endif()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES 80)  # until nvcc has told what it knows
    enable_language(CUDA)
    cfrt_cuda_architectures()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 (Debian 12) does not know that nvcc 13 speaks C++20
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CFRT_CUDA_FOUND ON)
    set(CFRT_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    message(STATUS "cfrt: CUDA kernels by ${CMAKE_CUDA_COMPILER} (${CFRT_CUDA_VERSION}) for sm_${CFRT_CUDA_ARCHS} and PTX")
  elseif(CFRT_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "CFRT_CUDA=ON, but there is no working nvcc: not on PATH, not in $CUDACXX, not under /usr/local/cuda, not in the "
      "build environment.\nSet CFRT_CUDA=ON in the environment (not as a CMake definition): pip then installs NVIDIA's "
      "compiler wheels for the build.")
  else()
    message(STATUS "cfrt: no nvcc found, so the module is CPU-only (CFRT_CUDA=ON fetches nvcc from NVIDIA's wheels)")
  endif()
endif()
