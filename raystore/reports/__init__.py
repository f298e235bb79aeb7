"""What the library tells people: pictures, and what a feed has trained on and thrown away."""
