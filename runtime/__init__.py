"""What any program of this kind needs, below the method: command line, files, device, model hub, several processes."""
