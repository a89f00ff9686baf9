"""The paper's mathematics: schedule, process, losses, samplers. Pure: no file, network or process group."""
