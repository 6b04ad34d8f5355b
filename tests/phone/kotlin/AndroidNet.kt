// What the glue takes of android.net.
package android.net

class Uri(val path: String)
