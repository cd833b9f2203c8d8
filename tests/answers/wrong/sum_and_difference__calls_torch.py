# fault: calls torch
def sum_and_difference(x, y, total, difference):
    total.copy_(x + y)
    difference.copy_(x - y)
