"""Tests of ptxsim."""
