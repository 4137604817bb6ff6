"""Run the command line without its script: `python -m farstep_service serve`."""

from farstep_service.cli import main

if __name__ == "__main__":
    main()
