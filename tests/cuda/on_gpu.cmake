# The program that drives the launchers, on a GPU, for NVIDIA's sanitizers: `cmake --build FOLDER --target drive_gpu`.
# It is linked with the kernels that the library is made of.
file(GLOB DRIVER_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/drive*.cpp)
add_executable(drive_gpu EXCLUDE_FROM_ALL ${DRIVER_SOURCES} ${CMAKE_CURRENT_LIST_DIR}/gpu_memory.cpp $<TARGET_OBJECTS:cuda_kernels>)
target_include_directories(drive_gpu PRIVATE csrc)
target_compile_options(drive_gpu PRIVATE -Wall -Wextra -O1)
target_link_libraries(drive_gpu PRIVATE CUDA::cudart_static)
set_target_properties(drive_gpu PROPERTIES LINKER_LANGUAGE CXX)
