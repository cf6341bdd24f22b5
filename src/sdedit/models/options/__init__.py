"""What a network offers besides computing: other ways of attention, tiling, processors, names of other libraries."""
