"""The functions behind the program's commands: keyword arguments in, results out; `import qeval` offers them.

A keyword is a flag's name with underscores, with the flag's default. Nothing is printed, and what a call changes in the
process (torch's threads and types) it puts back. Errors are the sentences that the program prints, as exceptions.
Importing these modules takes no torch; a call that needs it imports it. `qeval.__all__` lists the functions.
"""
