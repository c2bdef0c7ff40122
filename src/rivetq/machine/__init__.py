"""What is true: jobs, leases, queues and time. Pure: no clock, no files, no threads."""
