"""`python -m services.gateway --cluster F --index I` runs the gateway of a cluster until SIGTERM."""
