"""What people look at: pages, plots and Markdown tables of results."""
