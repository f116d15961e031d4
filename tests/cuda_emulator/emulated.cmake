# The kernels of csrc/cuda in the emulator, once for each way to watch them: in VARIANT/_ops.so, and in drive_VARIANT,
# a program that drives them without Python. All else is compiled once, and not watched.
set(VARIANTS coverage address thread)
set(WATCH_coverage --coverage)
set(WATCH_address -fsanitize=address,undefined -fno-sanitize-recover=all)
set(WATCH_thread -fsanitize=thread)
set(EMULATOR ${CMAKE_CURRENT_LIST_DIR})

list(TRANSFORM CUDA_OPS REPLACE ".+" "csrc/bind/torch_\\0.cpp" OUTPUT_VARIABLE TORCH_SOURCES)
add_library(bindings OBJECT ${TORCH_SOURCES} ${EMULATOR}/emulated.cpp)
compile_with_torch(bindings)
target_compile_definitions(bindings PRIVATE EVAKERNELS_CUDA EVAKERNELS_EMULATED)

file(GLOB DRIVER_SOURCES CONFIGURE_DEPENDS ${EMULATOR}/drive*.cpp)
add_library(driver OBJECT ${DRIVER_SOURCES})
target_include_directories(driver PRIVATE csrc)
target_compile_options(driver PRIVATE -Wall -Wextra -O1)

set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
foreach(variant IN LISTS VARIANTS)
  set(watch ${WATCH_${variant}})
  add_library(kernels_${variant} OBJECT ${CUDA_SOURCES})
  target_compile_definitions(kernels_${variant} PRIVATE EVAKERNELS_EMULATED)
  target_include_directories(kernels_${variant} PRIVATE csrc ${EMULATOR})
  # Device code is full of nvcc's #pragma unroll; -x: it would take .cu files for linker scripts.
  target_compile_options(kernels_${variant} PRIVATE -x c++ -Wall -Wextra -Wno-unknown-pragmas -g1 ${watch})

  add_library(emulator_${variant} OBJECT ${EMULATOR}/cuda_emulator.cpp ${EMULATOR}/cuda_runtime.cpp
                                         ${EMULATOR}/tensor_cores.cpp csrc/cuda/runtime.cpp)
  target_include_directories(emulator_${variant} PRIVATE csrc ${EMULATOR})
  # No function of the C library, which sanitizers watch.
  target_compile_options(emulator_${variant} PRIVATE -Wall -Wextra -O2 -fno-builtin -fno-tree-loop-distribute-patterns)
  string(TOUPPER EVAKERNELS_WATCH_${variant} told)
  target_compile_definitions(emulator_${variant} PRIVATE ${told})

  set(objects $<TARGET_OBJECTS:kernels_${variant}> $<TARGET_OBJECTS:emulator_${variant}>)
  add_library(ops_${variant} MODULE $<TARGET_OBJECTS:bindings> ${objects})
  set_target_properties(ops_${variant} PROPERTIES OUTPUT_NAME _ops LIBRARY_OUTPUT_DIRECTORY ${variant}
                                                  LINKER_LANGUAGE CXX)
  link_with_torch(ops_${variant})
  target_link_options(ops_${variant} PRIVATE ${watch})

  add_executable(drive_${variant} $<TARGET_OBJECTS:driver> ${objects})
  set_target_properties(drive_${variant} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_options(drive_${variant} PRIVATE ${watch})
endforeach()

# The same of the kernels that a compiler instruments for the thread sanitizer, but with functions of our own in its
# place: they count what the kernels ask of memory. With the Python module, whose launchers these kernels serve too.
add_library(emulator_audit OBJECT ${EMULATOR}/cuda_emulator.cpp ${EMULATOR}/cuda_runtime.cpp
                                  ${EMULATOR}/tensor_cores.cpp ${EMULATOR}/audit.cpp csrc/cuda/runtime.cpp
                                  csrc/cuda/device.cpp)
target_include_directories(emulator_audit PRIVATE csrc ${EMULATOR})
target_compile_options(emulator_audit PRIVATE -Wall -Wextra -O2)
set(objects $<TARGET_OBJECTS:kernels_thread> $<TARGET_OBJECTS:emulator_audit>)
add_library(ops_audit MODULE $<TARGET_OBJECTS:bindings> ${objects})
set_target_properties(ops_audit PROPERTIES OUTPUT_NAME _ops LIBRARY_OUTPUT_DIRECTORY audit LINKER_LANGUAGE CXX)
link_with_torch(ops_audit)

add_python_module(csrc/cpu/isa.cpp ${objects})
set_target_properties(_C PROPERTIES LIBRARY_OUTPUT_DIRECTORY audit)
target_compile_definitions(_C PRIVATE EVAKERNELS_CUDA EVAKERNELS_EMULATED)
