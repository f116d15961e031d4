# _ops.so with the kernels of csrc/cuda in the emulator, and a program that drives them without Python.
# EVAKERNELS_SANITIZE: the options of a sanitizer for the kernels, which the emulator itself is built without.
set(EVAKERNELS_SANITIZE "" CACHE STRING "Compiler options of a sanitizer")
set(EMULATOR ${CMAKE_CURRENT_LIST_DIR})
separate_arguments(SANITIZE UNIX_COMMAND "${EVAKERNELS_SANITIZE}")

set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
add_library(emulated_kernels OBJECT ${CUDA_SOURCES})
target_compile_definitions(emulated_kernels PRIVATE EVAKERNELS_EMULATED)
target_include_directories(emulated_kernels PRIVATE csrc ${EMULATOR})
# Device code is full of nvcc's #pragma unroll; -x: it would take .cu files for linker scripts.
target_compile_options(emulated_kernels PRIVATE -x c++ -Wall -Wextra -Wno-unknown-pragmas ${SANITIZE})

add_library(emulator OBJECT ${EMULATOR}/cuda_emulator.cpp)
# No function of the C library, which sanitizers watch.
target_compile_options(emulator PRIVATE -Wall -Wextra -O2 -fno-builtin -fno-tree-loop-distribute-patterns)
if(EVAKERNELS_SANITIZE MATCHES "thread")
  target_compile_definitions(emulator PRIVATE EVAKERNELS_TSAN)
elseif(EVAKERNELS_SANITIZE MATCHES "address")
  target_compile_definitions(emulator PRIVATE EVAKERNELS_ASAN)
endif()

list(TRANSFORM CUDA_OPS REPLACE ".+" "csrc/bind/torch_\\0.cpp" OUTPUT_VARIABLE TORCH_SOURCES)
add_torch_library(${TORCH_SOURCES} $<TARGET_OBJECTS:emulated_kernels> $<TARGET_OBJECTS:emulator>)
target_compile_definitions(_ops PRIVATE EVAKERNELS_CUDA EVAKERNELS_EMULATED)
target_link_options(_ops PRIVATE ${SANITIZE})

add_executable(drive EXCLUDE_FROM_ALL ${EMULATOR}/drive.cpp ${EMULATOR}/drive_lamb.cpp ${EMULATOR}/drive_swiglu.cpp
                                      ${EMULATOR}/drive_token_dropout.cpp
                                      $<TARGET_OBJECTS:emulated_kernels> $<TARGET_OBJECTS:emulator>)
target_include_directories(drive PRIVATE csrc)
target_compile_options(drive PRIVATE -Wall -Wextra)
target_link_options(drive PRIVATE ${SANITIZE})
