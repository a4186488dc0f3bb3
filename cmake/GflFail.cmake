# gfl_fail(why hint): stops the configuration. The two sentences are also left in gfl_failure.txt, where
# setup.py finds them for _build_report.json.
file(REMOVE "${CMAKE_BINARY_DIR}/gfl_failure.txt")
function(gfl_fail why hint)
  file(WRITE "${CMAKE_BINARY_DIR}/gfl_failure.txt" "${why}\n${hint}\n")
  message(FATAL_ERROR "${why}; ${hint}")
endfunction()
