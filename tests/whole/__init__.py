"""Tests of the whole: what README says."""
