// y = the sum over segments of partial [segments, ...], one after the other.
const int i = int(thread_position_in_grid.x);
float sum = 0.0f;
for (int s = 0; s < partial_shape[0]; s++) sum += partial[s * int(threads_per_grid.x) + i];
y[i] = T(sum);
