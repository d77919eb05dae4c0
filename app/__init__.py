"""The explorer: a Streamlit app over workbench and probes. It asks, shows and keeps; it holds no formula.

The page's process never imports torch: `worker` talks to a process that does (`worker_process`, `tasks`, `plain`), and jobs are
verbs of the command line. All else runs in the page.
"""
