"""Reinforcement learning and preferences: cores on tensors, policies, rewards, and where their workers run."""
