"""greedyprune inside other libraries: trainers and pruners. Only these modules import them."""
