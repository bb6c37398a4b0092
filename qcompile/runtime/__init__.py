"""What lives as long as the process: the packed-weight store."""
