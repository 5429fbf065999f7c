"""The web page of `vlm-calibration app`, in Gradio."""
