"""Load and drills against an OpenAI-compatible endpoint: Locust users, replica loss, outage, long prompts."""
