"""What tests share: comparisons, networks of other libraries, scripts for other processes."""
