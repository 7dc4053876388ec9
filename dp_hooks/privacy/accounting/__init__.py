"""What has been spent: charges to an accountant, and the budget that bounds them."""
