# Compiles SOURCES with NVCC for ARCHS into OUTPUT. With REQUIRED off a failure is a warning, and leaves no file.
# What nvcc reports, registers and spills included, goes to OUTPUT.txt.
string(REPLACE "," ";" SOURCES "${SOURCES}")
string(REPLACE "," ";" ARCHS "${ARCHS}")
get_filename_component(folder ${OUTPUT} DIRECTORY)
file(MAKE_DIRECTORY ${folder})
file(REMOVE ${OUTPUT})
set(targets "")
foreach(arch ${ARCHS})
  list(APPEND targets -gencode arch=compute_${arch},code=sm_${arch})
endforeach()
execute_process(
  COMMAND ${NVCC} -ccbin ${HOST_CXX} -std=c++17 -O3 -t 0 -Xptxas -v --shared -cudart static -Xcompiler -fPIC,-fvisibility=hidden ${targets}
          -o ${OUTPUT} ${SOURCES}
  RESULT_VARIABLE status
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)
file(WRITE ${OUTPUT}.txt "${output}")
if(NOT status EQUAL 0)
  file(REMOVE ${OUTPUT})
  if(REQUIRED)
    message(FATAL_ERROR "blip3o: nvcc failed\n${output}")
  endif()
  message(WARNING "blip3o: nvcc failed, installing without the CUDA library\n${output}")
endif()
