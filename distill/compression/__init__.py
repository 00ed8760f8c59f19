"""What becomes of a student that is made smaller: its quality, size, speed and memory in each form.

`compress` makes the forms, `measure_compressed` measures them and puts them through the gate's threshold; `timing` has
the clocks that reports use for every model.
"""
