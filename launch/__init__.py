"""Starting and operating the system: command line, scripts, cluster manifests, self-checks."""
