"""What each procedure does: methods with the procedures' names, in classes by subject.

A method that only reads what is in memory is a plain function; one that waits for vmand is a coroutine.
"""
