"""What a GPU would run, read from the machine code that Triton compiles on any CPU: no kernel is executed here.

`stand_in` takes the place of Triton's GPU driver and records launches, `resources` reads what a compiled kernel needs,
`worker` compiles in a process of its own, because interpreted and compiled kernels do not mix in one.
"""
