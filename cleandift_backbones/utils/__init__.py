"""What every room uses: the base of all errors, files written aside and renamed (atomic), locks, progress, seeds."""
