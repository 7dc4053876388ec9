"""How batches are drawn, and how logical batches are split into physical ones."""
