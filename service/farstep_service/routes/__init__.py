"""HTTP in, HTTP out: no arithmetic, no policy."""

from farstep_service.routes.bodies import OUTGOING, RECEIVE_INTO, Pace, Sink
from farstep_service.routes.control import control_router
from farstep_service.routes.data import data_routes
from farstep_service.routes.history import history_router
from farstep_service.routes.page import page_of
from farstep_service.routes.problems import ADMITTED, PROBLEM, Edge, error_of, problem_of
from farstep_service.routes.session_files import session_file_routes

__all__ = [
    "ADMITTED",
    "OUTGOING",
    "PROBLEM",
    "RECEIVE_INTO",
    "Edge",
    "Pace",
    "Sink",
    "control_router",
    "data_routes",
    "error_of",
    "history_router",
    "page_of",
    "problem_of",
    "session_file_routes",
]
