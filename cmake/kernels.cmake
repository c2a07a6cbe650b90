# The CPU kernels: every file of the list is compiled once for each instruction set level, and all of them go into the
# one module, which picks at run time (csrc/cpu/isa.h). CFRT_TARGET is what gets them, CFRT_CXX_OPTIONS what compiles
# everything.
set(CFRT_KERNEL_FOLDER ${CMAKE_CURRENT_LIST_DIR}/../csrc/cpu/kernels/)
set(CFRT_KERNELS attention ceiling conv gemm_bf16 gemm_fp32 gemm_int8 gemm_rows pointwise)

# cfrt_level(name number flags...): csrc/cpu/simd.h says what the two macros mean.
function(cfrt_level name number)
  list(TRANSFORM CFRT_KERNELS PREPEND ${CFRT_KERNEL_FOLDER} OUTPUT_VARIABLE sources)
  list(TRANSFORM sources APPEND .cpp)
  add_library(cfrt_kernels_${name} OBJECT ${sources})
  target_compile_definitions(cfrt_kernels_${name} PRIVATE CFRT_LEVEL=${name} CFRT_SIMD=${number})
  # GCC 12 finds its own header's "undefined" vectors undefined.
  target_compile_options(cfrt_kernels_${name} PRIVATE
    ${CFRT_CXX_OPTIONS} "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>" ${ARGN})
  # Link-time optimisation might move code from one level into another.
  set_target_properties(cfrt_kernels_${name} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
  target_link_libraries(${CFRT_TARGET} PRIVATE cfrt_kernels_${name})
endfunction()

cfrt_level(plain 0)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(avx2 -mavx2 -mfma)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl)
  cfrt_level(avx2 1 ${avx2})
  cfrt_level(avx512 2 ${avx512})
  cfrt_level(avx512bf16 3 ${avx512} -mavx512bf16 -mavx512vnni)
  target_compile_definitions(${CFRT_TARGET} PRIVATE CFRT_X86_LEVELS)
endif()
