"""What evaluate_speed.py is made of: engines in processes of their own, measured in turn, and the rows of the result."""
