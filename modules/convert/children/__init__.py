"""What runs in a loader's environment during a conversion: started with -m, one process each."""
