"""What our programs need of a TPU or a CUDA GPU, compiled without one."""
