"""What people look at: sample grids and, later, pages."""
