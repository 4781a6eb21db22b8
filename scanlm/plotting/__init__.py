"""Figures: functions that take records, traces or arrays and return matplotlib figures.

``style`` the look and one colour per model family; ``scan`` tree, counter, cost and influence;
``training`` curves from records; ``cost`` arithmetic and memory; ``comparison`` the families side
by side; ``architecture`` the model; ``figures`` the committed pictures.
"""
